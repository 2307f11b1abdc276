"""The Streamlit dashboard: pages in views/, charts in charts/, their data in figures/, child processes in children/."""
