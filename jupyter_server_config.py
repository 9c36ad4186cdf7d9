# JupyterLab, started in this folder (`make lab`), reads this: a notebook is saved as git keeps it, without
# execution counts and without what an editor notes of itself. So opening a page changes no file.
from nbdev.clean import clean_jupyter

c.FileContentsManager.pre_save_hook = clean_jupyter  # noqa: F821
