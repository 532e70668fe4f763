"""Studies: trained arms side by side, with seeds, tables, plots and verdicts."""
