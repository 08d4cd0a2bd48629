class AutoTokenizer:
    pass
