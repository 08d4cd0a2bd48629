"""Several processes on one training, applied from outside: the model and its kernels know nothing of it."""
