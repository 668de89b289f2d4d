"Write README.md from nbs/index.ipynb, as `nbdev_readme` does, without Quarto: `python tools/readme.py`."
import json, re
from pathlib import Path

root = Path(__file__).resolve().parents[1]

def _relink(text:str) -> str:
    "Links and pictures relative to nbs/, made relative to the repository."
    return re.sub(r'(\]\(|src=")(?!\w+:|#|/)([^)"\s]+)', r'\1nbs/\2', text)

def _outputs(cell:dict) -> str:
    "What a cell printed or returned: Markdown as it is, other text indented."
    shown = ''
    for o in cell['outputs']:
        data = o.get('data') or {}
        text = ''.join(data.get('text/markdown') or o.get('text') or data.get('text/plain') or '').strip()
        if text: shown += '\n\n' + (text if 'text/markdown' in data else '\n'.join(f'    {line}'.rstrip() for line in text.splitlines()))
    return shown

def readme(
    nb:dict # the index notebook as JSON
) -> str: # Markdown of its visible cells
    "README.md of a notebook: prose, shown code and its text outputs; `#| hide` and `#| include: false` cells left out."
    parts = ['<!-- Written from nbs/index.ipynb by tools/readme.py: edit the notebook. -->']
    for cell in nb['cells']:
        source = ''.join(cell['source']).strip()
        flags = re.findall(r'^#\|\s*(.+?)\s*$', source, re.M)
        if not source or cell['cell_type'] == 'raw' or {'hide', 'include: false'} & set(flags): continue
        if cell['cell_type'] == 'markdown': parts.append(_relink(source))
        else: parts.append('```python\n' + re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip() + '\n```' + _outputs(cell))
    return '\n\n'.join(parts) + '\n'

if __name__ == '__main__':
    text = readme(json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8')))
    (root/'README.md').write_text(text, encoding='utf-8')
