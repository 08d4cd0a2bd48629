to_tensor = None
