"""The names that MosaicML Streaming imports, so that torchvision itself need not be installed: no test calls them."""
