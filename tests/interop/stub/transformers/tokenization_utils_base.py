class BatchEncoding:
    pass
