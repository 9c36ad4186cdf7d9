"Sphinx's settings. build.py stages the sources. Nothing is executed, and no reader asks another host."
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
ABOUT = tomllib.loads((REPO/'pyproject.toml').read_text())['project']

project, author = ABOUT['name'], ABOUT['authors'][0]['name']
copyright = author
extensions = ['myst_nb', 'sphinx_copybutton']
exclude_patterns = ['_static', '**.ipynb_checkpoints']

nb_execution_mode = 'off'
nb_render_markdown_format = 'gfm'
nb_number_source_lines = False
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'deflist']
myst_heading_anchors = 6
myst_dmath_allow_space = myst_dmath_allow_digits = False     # $5 is money
myst_links_external_new_tab = False

suppress_warnings = [
    'myst.xref_missing',       # build.py follows every link in the finished pages, those to HTML anchors too
    'myst.header', 'toc.not_included', 'mystnb.unknown_mime_type', 'misc.highlighting_failure',
]
python_maximum_signature_line_length = 72
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = 'hide'

html_theme = 'sphinx_book_theme'
html_title = ABOUT['name']
html_static_path = [str(REPO/'_docs'/'src'/'_static')]
html_css_files = ['site.css']
html_favicon = 'favicon.svg'
html_context = {'default_mode': 'auto'}       # light or dark as the reader's system has it
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {'**': ['navbar-logo.html', 'search-button-field.html', 'sbt-sidebar-nav.html']}
html_theme_options = {
    'show_toc_level': 2, 'show_navbar_depth': 1, 'collapse_navigation': True, 'max_navbar_depth': 3,
    'use_download_button': False, 'use_fullscreen_button': False,
    'home_page_in_toc': True, 'navigation_with_keys': False, 'show_prev_next': True,
}
mathjax_path = 'mathjax/tex-svg.js'
mathjax3_config = {
    'tex': {'inlineMath': [['\\(', '\\)']], 'displayMath': [['\\[', '\\]']]},
    'options': {'enableMenu': False, 'processHtmlClass': 'tex2jax_process|mathjax_process|math|output_area'},
}
copybutton_exclude = '.linenos, .gp, .go'
