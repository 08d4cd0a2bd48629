class BatchFeature:
    pass
