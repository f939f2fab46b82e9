"""Charts: described once (``chart``), drawn by plotly for the page and by matplotlib as SVG and PNG."""
