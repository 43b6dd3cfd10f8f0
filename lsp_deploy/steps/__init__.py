"""The steps of `compress`, one a file, in the order in which `lsp_deploy/compress.py` takes them."""
