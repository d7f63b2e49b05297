"""The networks and their layers, every network by name and every weight file; conversion; the bound."""
