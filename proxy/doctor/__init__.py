"""`sluice doctor`: what is wrong on a node, and in which order; `verb` says how it goes."""
