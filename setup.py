"Everything about the package is said in settings.ini; this only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='])
parser.read(root/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
lib, scripts = cfg['lib_path'], cfg['console_scripts'].split()

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(root/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    keywords=cfg['keywords'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Natural Language :: English',
        *[f'Programming Language :: Python :: {v}' for v in ('3.11', '3.12', '3.13')],
    ],
    packages=find_packages(include=[lib, f'{lib}.*']),
    package_data={lib: ['recipes/*.yaml']},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require={name.removesuffix('_requirements'): text.split() for name, text in cfg.items() if name.endswith('_requirements')},
    entry_points={'console_scripts': scripts, 'nbdev': [f'{lib}={lib}._modidx:d']},
    zip_safe=False,
)
