"""The documentation builds: what the site's build does up to Quarto, then links, HTML and a real browser.

Quarto itself is only run by the workflow that publishes the site."""
import json, os, re, shutil, subprocess, sys
from collections import namedtuple
from pathlib import Path

import pytest
from nbdev.config import get_config

from conftest import copy_repository, root, run_python
from test_notebooks import notebooks

Site = namedtuple('Site', 'path pages anchors links output')
BUILD = "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0)"
base = '{doc_host}{doc_baseurl}/'.format(**get_config(path=root).d)


def slug(heading:str) -> str:
    "The anchor that Pandoc gives to a heading."
    given = re.search(r'\{[^}]*#([\w.-]+)[^}]*\}\s*$', heading)
    if given: return given[1]
    text = re.sub(r'\{[^}]*\}\s*$|!?\[([^\]]*)\]\([^)]*\)|[`*]', lambda m: m[1] or '', heading).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text)))


def markdown(nb:dict) -> str:
    "Prose and rendered documentation of a processed notebook, without code fences."
    parts = []
    for cell in nb['cells']:
        if cell['cell_type'] != 'code': parts.append(''.join(cell['source']))
        else: parts += [''.join(o.get('data', {}).get('text/markdown', '')) for o in cell.get('outputs', [])]
    return re.sub(r'^(```+).*?^\1', '', '\n\n'.join(parts), flags=re.M | re.S)


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Site:
    "All notebooks as nbdev hands them to Quarto, from a copy of the repository that is installed there."
    path = copy_repository(tmp_path_factory.mktemp('site'))
    made = subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info'], cwd=path, capture_output=True, text=True)  # the links come from its entry point
    assert made.returncode == 0, made.stderr
    done = run_python(BUILD, cwd=path)
    assert done.returncode == 0, f'the documentation does not build:\n{done.stderr[-4000:]}'
    pages, anchors, links = {}, {}, []
    for notebook in notebooks:
        nb = json.loads((path/'_proc'/notebook.relative_to('nbs')).read_text(encoding='utf-8'))
        text = markdown(nb)
        named = re.search(r'^output-file:\s*(\S+)', ''.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'raw'), re.M)
        page = (notebook.relative_to('nbs').parent/(named[1] if named else notebook.with_suffix('.html').name)).as_posix()
        pages[page] = path/'_proc'/notebook.relative_to('nbs')
        anchors[page] = {slug(h) for h in re.findall(r'^#{1,6}\s+(.+)$', text, re.M)} | set(re.findall(r'\bid="([^"]+)"', text))
        links += [(page, o) for o in re.findall(r'\]\(([^)\s]+)\)|(?:href|src)="([^"]+)"', text) for o in o if o]
    return Site(path, pages, anchors, links, done.stdout + done.stderr)


@pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.relative_to('nbs').as_posix())
def test_first_cell_is_title_and_tagline_only(notebook):
    "nbdev turns the cell of the title into metadata: whatever else it says is lost from the page."
    cell = json.loads((root/notebook).read_text(encoding='utf-8'))['cells'][0]
    assert cell['cell_type'] == 'markdown' and re.fullmatch(r'# \S[^\n]*\n+> \S[^\n]*\n*', ''.join(cell['source']))


def test_every_notebook_becomes_a_page(site):
    assert len(site.pages) == len(notebooks) and 'index.html' in site.pages


def test_build_says_nothing(site):
    "A warning of the build is a page that lacks something."
    assert not re.search('Traceback|Error|Warning', site.output), site.output[-4000:]


def test_links_to_our_pages_lead_somewhere(site):
    "Symbols in backticks are linked to page and anchor: both exist. (A method has an anchor only if it is shown by `show_doc`.)"
    ours = [(page, *link[len(base):].partition('#')[::2]) for page, link in site.links if link.startswith(base)]
    assert [o for o in ours if o[1] not in site.pages or (o[2] and o[2] not in site.anchors[o[1]])] == []
    if any(p.suffix == '.py' and not p.name.startswith('_') for p in (root/'c2c_nb').iterdir()): assert ours, 'nothing was linked'


def test_relative_links_lead_somewhere(site):
    dead = []
    for page, link in site.links:
        target, _, anchor = link.partition('#')
        if re.match(r'\w+:|//', link): continue
        file = site.pages[page].parent/target if target else site.pages[page]
        named = {p.resolve(): n for n, p in site.pages.items()}.get(file.resolve())
        if not file.exists() or (anchor and named and anchor not in site.anchors[named]): dead.append((page, link))
    assert dead == []


@pytest.fixture(scope='module')
def html(site) -> dict:
    "Every page as HTML that needs nothing from the network."
    from nbconvert import HTMLExporter
    exporter = HTMLExporter(require_js_url='', jquery_url='', mathjax_url='', mermaid_js_url='')
    out = {}
    for page, notebook in site.pages.items():
        out[page] = notebook.with_suffix('.html')
        out[page].write_text(exporter.from_filename(str(notebook))[0], encoding='utf-8')
    return out


def test_pages_render_to_html(html):
    assert [p for p, file in html.items() if file.stat().st_size < 20_000] == []
    external = re.compile(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?://[^"]+)"')
    assert [(p, o) for p, file in html.items() for o in external.findall(file.read_text(encoding='utf-8'))] == [], 'pages load nothing from elsewhere'


def test_pages_open_in_a_browser(html, tmp_path):
    browser = next((b for b in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome')) if b), None)
    if not browser: pytest.skip('no Chromium on this machine: install chromium to look at the pages in a browser')
    shots = Path(os.environ.get('C2C_SHOTS') or tmp_path)
    for page, file in html.items():
        shot = shots/(page.replace('/', '-') + '.png')
        done = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars', f'--user-data-dir={tmp_path}/profile',
                               '--host-resolver-rules=MAP * ~NOTFOUND', '--enable-logging=stderr', '--window-size=1280,2400', '--virtual-time-budget=5000',
                               f'--screenshot={shot}', file.as_uri()], capture_output=True, text=True, timeout=120)
        said = [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
        assert done.returncode == 0 and not said, f'{page}: {said or done.stderr[-2000:]}'
        assert shot.stat().st_size > 20_000, f'{page} is nearly empty'
