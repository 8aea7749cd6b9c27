"""Which way of spreading a model over many devices is fastest: costs counted from sizes, and a search over layouts."""
