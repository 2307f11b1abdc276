"""The Streamlit dashboard: pages in views/, charts in charts.py, what they show in plain modules beside them."""
