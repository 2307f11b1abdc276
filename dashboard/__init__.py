"""The Streamlit dashboard's package."""
