"""The memory tier: strongly consistent pages, and the strong read behind them."""
