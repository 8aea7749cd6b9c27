"""Low precision: rewrites model -> model that put the products of chosen layers into narrow number formats."""
