"Every link and every picture of a built site, followed on disk."
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {('script', 'src'), ('img', 'src'), ('source', 'src'), ('iframe', 'src'),
         ('video', 'src'), ('object', 'data')}


class Page(HTMLParser):
    "What a page offers (ids), where it leads (links), what a browser fetches for it (loads)."
    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.inside = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids.update(v for k in ('id', 'name') if (v := a.get(k)))
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag == 'link' and a.get('href') and (set((a.get('rel') or '').split()) - {'canonical'}):
            self.loads.append(a['href'])
        self.loads += [a[k] for t, k in LOADS if t == tag and a.get(k)]


def problems(site: Path) -> list[str]:
    "One line per broken link, and per file that a browser would fetch from another host."
    site = site.resolve()
    pages = {p: Page(p.read_text()) for p in sorted(site.rglob('*.html')) if '_static' not in p.parts}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        for url in page.loads:
            parts = urlsplit(url)
            if parts.scheme == 'data': continue
            if parts.netloc or parts.scheme: found.append(f'{where}: fetches {url}')
            elif not (path.parent/unquote(parts.path)).resolve().exists():
                found.append(f'{where}: {url} is not there')
        for url in page.links:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc: continue
            target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target = target/'index.html'
            if not target.exists(): found.append(f'{where}: {url} leads nowhere')
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f'{where}: {url}: no such place on that page')
    for style in sorted(site.rglob('*.css')):
        for url in re.findall(r'''(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]+)''', style.read_text()):
            found.append(f'{style.relative_to(site)}: fetches {url}')
    return found


if __name__ == '__main__':
    lines = problems(Path(sys.argv[1]))
    print(*lines, sep='\n')
    raise SystemExit(bool(lines))
