"""The first run, composed of all the other rooms."""
