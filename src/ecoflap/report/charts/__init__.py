"""Charts: described once (``chart``), drawn by plotly for the page and as SVG for paper and e-mail."""
