"""Seeing it: pictures of where the tokens went. matplotlib and PIL are loaded when something is drawn."""
