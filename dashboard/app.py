"""The script that Streamlit runs: the login, if there is one, the pages and their navigation."""

from pathlib import Path

import streamlit as st
from stageline.dashboard.views import compare, engines, environment, live, overview, plan, run, timeline

PAGES = {
    "overview": st.Page(overview.show, title="Overview", icon=":material/speed:", default=True),
    "timeline": st.Page(timeline.show, title="Timeline", icon=":material/view_timeline:", url_path="timeline"),
    "compare": st.Page(compare.show, title="Compare", icon=":material/compare_arrows:", url_path="compare"),
    "live": st.Page(live.show, title="Live", icon=":material/monitor_heart:", url_path="live"),
    "run": st.Page(run.show, title="Run a benchmark", icon=":material/play_circle:", url_path="run"),
    "plan": st.Page(plan.show, title="Plan", icon=":material/account_tree:", url_path="plan"),
    "engines": st.Page(engines.show, title="Engines", icon=":material/layers:", url_path="engines"),
    "environment": st.Page(environment.show, title="Environment", icon=":material/memory:", url_path="environment"),
}
SECTIONS = {
    "Results": ["overview", "timeline", "compare"],
    "Measure": ["run", "live"],
    "Model": ["plan", "engines", "environment"],
}
_HERE = Path(__file__).parent

# Twice: the icon before the pages, which would else load theirs from another machine, and the title once it is known.
st.set_page_config(page_title="Stageline", page_icon=str(_HERE / "icon.png"), layout="wide")
chosen = st.navigation({name: [PAGES[page] for page in pages] for name, pages in SECTIONS.items()}, expanded=True)
st.set_page_config(page_title=f"{chosen.title} - Stageline")
st.html(_HERE / "page.css")
st.logo(str(_HERE / "logo.svg"), size="large", icon_image=str(_HERE / "icon.png"))
if st.secrets.load_if_toml_exists() and "auth" in st.secrets and not st.user.is_logged_in:
    st.title("Stageline", anchor=False)
    st.button("Log in", on_click=st.login, type="primary", key="login")
    st.stop()
st.session_state["pages"] = PAGES  # for page links
chosen.run()
