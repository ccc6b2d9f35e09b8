"""Every figure. Functions return a matplotlib Figure and write nothing."""
