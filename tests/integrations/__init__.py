"""Other packages that train models, with an optimized module in them; see the extra `test-integrations`."""
