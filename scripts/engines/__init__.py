"""Serving engines as their users install them, and what `scripts/engine-check` asks of them."""
