class OutputCache:
    pass
