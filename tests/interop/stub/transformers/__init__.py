"""The names that MosaicML Streaming imports, so that transformers itself need not be installed: no test calls them."""
