"The project's own rules: the order of the rooms, sizes, settings, light imports, documentation, what the text must not hold"
import ast
import configparser
import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fastai.callback.core import Callback
from fastai.learner import Metric
from fastcore.docments import docments
from torch import Tensor, nn

try: import tomllib
except ImportError: import tomli as tomllib

import fastai_smooth
import fastai_smooth.all as exported

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {p.stem.split('_', 1)[1]: p for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))}  # in their order, by the name of the module
MODULES = list(NOTEBOOKS)
TORCH_ONLY = {'targets', 'distributions', 'kernels', 'losses'}  # rooms that a script without fastai imports
USERS_HAVE_THEM = {'matplotlib', 'fastai', 'numpy'}  # only inside functions of these rooms that draw, or take what fastai made
HAND_WRITTEN = {'noise', 'recipes'}  # thin packages under older names
LINES, CELL_LINES = 390, 105  # of a module and of one exported cell


def source_of(module): return (ROOT/'fastai_smooth'/f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')
def cells_of(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def text_of(cell): return ''.join(cell['source'])
def room_of(module): return module.split('.')[0]


def imported(tree, inside=()):
    "The modules that a syntax tree imports, as (absolute name, whether inside a function); `inside` is the package of relative ones"
    found = []
    def visit(node, deep):
        if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING': return  # nothing is imported when it runs
        if isinstance(node, ast.Import): found.extend((a.name, deep) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(inside[:len(inside)-node.level+1]) if node.level else []
            name = '.'.join([*base, *([node.module] if node.module else [])])
            found.append((name, deep))
        for child in ast.iter_child_nodes(node): visit(child, deep or isinstance(node, (ast.FunctionDef, ast.Lambda)))
    visit(tree, False)
    return found


def test_each_notebook_writes_the_module_of_its_name_and_no_module_lacks_one():
    written = [m.group(1) for p in NOTEBOOKS.values() for c in cells_of(p) if (m := re.search(r'^#\| *default_exp +(\S+)', text_of(c), re.M))]
    assert written == MODULES
    files = ['.'.join(p.relative_to(ROOT/'fastai_smooth').with_suffix('').parts) for p in (ROOT/'fastai_smooth').rglob('*.py')]
    assert sorted(f for f in files if not f.split('.')[-1].startswith('_')) == sorted(MODULES)


@pytest.mark.parametrize('module', [m for m in MODULES if m != 'all'])
def test_a_module_imports_only_earlier_ones(module):
    earlier = MODULES[:MODULES.index(module)]
    inside = ('fastai_smooth', *module.split('.')[:-1])
    for name, deep in imported(ast.parse(source_of(module)), inside):
        top, _, ours = name.partition('.')
        if top != 'fastai_smooth':
            if room_of(module) in TORCH_ONLY and top not in sys.stdlib_module_names | {'torch', 'triton'}:
                assert deep and top in USERS_HAVE_THEM, f'{module} imports {name}'
        elif ours:
            of_room = [m for m in MODULES if room_of(m) == room_of(ours)]
            if room_of(ours) == room_of(module): assert ours in earlier, f'{module} imports the later {ours}'
            else:
                earlier_room = of_room and all(m in earlier for m in of_room)
                assert earlier_room and ours == room_of(ours), f'{module} imports {ours}: not an earlier room, or a file in it'


def test_no_notebook_imports_a_later_room():
    for module, path in NOTEBOOKS.items():
        for cell in cells_of(path):
            if cell['cell_type'] != 'code' or module == 'all': continue
            runs = re.sub(r'^if TYPE_CHECKING:.*(\n +.*)*', '', text_of(cell), flags=re.M)
            for name in re.findall(r'^\s*(?:from|import)\s+fastai_smooth\.([\w.]+)', runs, re.M):
                later = [m for m in MODULES[MODULES.index(module)+1:] if m == name or (room_of(m) == name != room_of(module))]
                assert not later and (name != 'all' or module == 'cli'), f'{path.name} imports {name}'


def test_modules_and_export_cells_are_short():
    long = {m: n for m in MODULES if (n := len(source_of(m).splitlines())) > LINES}
    assert not long, f'modules of more than {LINES} lines: {long}'
    cells = {(p.name, c['id']): n for p in NOTEBOOKS.values() for c in cells_of(p)
             if re.match(r'#\| *exporti?\b', text_of(c)) and (n := len(text_of(c).splitlines())) > CELL_LINES}
    assert not cells, f'exported cells of more than {CELL_LINES} lines: {cells}'


def test_no_star_imports():
    for p in (ROOT/'fastai_smooth').rglob('*.py'): assert 'import *' not in p.read_text(encoding='utf-8'), p


def test_packages_show_what_their_modules_export():
    for room in {room_of(m) for m in MODULES if '.' in m}:
        package = importlib.import_module(f'fastai_smooth.{room}')
        assert inspect.getdoc(package) and package.__all__
        hidden = [n for n in package.__all__ if not hasattr(package, n)]
        assert not hidden, f'{room} promises {hidden}'
    for room in HAND_WRITTEN: assert importlib.import_module(f'fastai_smooth.{room}').__all__


def test_settings_ini_equals_pyproject():
    config = configparser.ConfigParser()
    config.read(ROOT/'settings.ini')
    s, toml = config['DEFAULT'], tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))
    p, nbdev = toml['project'], toml['tool']['nbdev']
    assert s['lib_name'] == p['name'] and s['description'] == p['description'] and s['version'] == fastai_smooth.__version__
    assert f">={s['min_python']}" == p['requires-python'] and s['author'] == p['authors'][0]['name']
    assert s['keywords'].split() == [k.replace(' ', '-') for k in p['keywords']] and s['license'] == 'apache2' and p['license'] == 'Apache-2.0'
    assert s['requirements'].split() == p['dependencies']
    extras = p['optional-dependencies']
    assert s['dev_requirements'].split() == extras['all'] + [d for d in extras['dev'] if d != 'fastai_smooth[all]']
    assert [s['console_scripts']] == [f'{k}={v}' for k, v in p['scripts'].items()]
    for k in ('lib_path', 'nbs_path', 'doc_path', 'branch', 'readme_nb'): assert s[k] == nbdev[k]
    assert p['urls']['Repository'].endswith(f"{s['user']}/{s['repo']}")
    assert not [d for d in [*p['dependencies'], *extras['dev'], *extras['all']] if '<' in d or '==' in d], 'an upper limit on a dependency'


@pytest.mark.processes
def test_import_is_light():
    code = "import sys, fastai_smooth; print(sorted({'torch', 'fastai', 'numpy', 'timm', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


@pytest.mark.processes
def test_all_replaces_fastais_names_and_nothing_else():
    code = ("from fastai.vision.all import *\nbefore = dict(globals())\nfrom fastai_smooth.all import *\n"
            "print(sorted(k for k in before if before[k] is not globals()[k]))")
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "['LabelSmoothingCrossEntropy', 'LabelSmoothingCrossEntropyFlat']"


SHOWN = {'cli': ['main']}  # of a module that is no room


def public():
    "What a room shows: the module that holds it, its name, itself"
    for room in dict.fromkeys(map(room_of, MODULES)):
        if room == 'all': continue
        shown = importlib.import_module(f'fastai_smooth.{room}')
        for name in SHOWN.get(room, shown.__all__):
            obj = getattr(shown, name)
            if not callable(obj) or (isinstance(obj, type) and issubclass(obj, Exception)): continue
            module = getattr(obj, '__module__', '').removeprefix('fastai_smooth.')
            yield module if module in MODULES else next(m for m in MODULES if room_of(m) == room), name, obj


def lacks_of(module, name, obj):
    "What is missing of the documentation of a public function or class"
    if not inspect.getdoc(obj): yield f'{name} has no docstring'
    own_init = inspect.isclass(obj) and '__init__' in vars(obj) and not dataclasses.is_dataclass(obj)
    source = inspect.getsource(obj.__init__ if own_init else obj)
    if dataclasses.is_dataclass(obj): source = '\n'.join(inspect.getsource(c) for c in obj.__mro__ if dataclasses.is_dataclass(c))  # fields are inherited
    parameters = list(inspect.signature(obj).parameters.values()) if inspect.isfunction(obj) or inspect.isclass(obj) else []
    for p in parameters:  # a docment: a comment on the line of the parameter
        if inspect.isclass(obj) and '__init__' not in vars(obj): break
        if not re.search(rf'^\s*\*{{0,2}}{p.name}\b.*#', source, re.M): yield f'{name}({p.name}) has no docment'
    shown = [c for c in cells_of(NOTEBOOKS[module]) if not re.match(r'#\| *exporti?\b', text_of(c))]
    if not any(re.search(rf'\b{name}\b', text_of(c)) for c in shown): yield f'{name} is neither used nor explained in its notebook'


def test_public_names_are_documented():
    missing = [f'{m}: {lack}' for m, name, obj in public() for lack in lacks_of(m, name, obj)]
    assert not missing, '\n'.join(missing)


def methods():
    "Public methods that a public class is the first to have: not overrides, not fastai's events, not torch's protocol"
    for m, name, cls in public():
        if not isinstance(cls, type) or cls.__name__ != name: continue
        for k, v in vars(cls).items():
            f = v.__func__ if isinstance(v, (classmethod, staticmethod)) else v
            known = [*cls.__mro__[1:], Tensor, nn.Module, Callback, Metric]
            if k[0] == '_' or not inspect.isfunction(f) or re.match('(before|after)_', k) or any(hasattr(b, k) for b in known): continue
            yield f'{m}.{name}.{k}', f, cls


def test_public_methods_are_documented():
    missing = [f'{name} has no docstring' for name, f, _ in methods() if not f.__doc__]
    for name, f, cls in methods():
        if cls.__name__ not in exported.__all__: continue
        told = docments(f)
        missing += [f'{name}: no docment for {k}' for k, p in inspect.signature(f).parameters.items()
                    if k not in ('self', 'cls') and not told.get(k) and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert not missing, '\n'.join(missing)


def untyped():
    "Parameters and results of public functions and of the public methods of public classes, inherited ones of this package too, without a type"
    for m, name, obj in public():
        if m == 'cli': continue  # the annotations of a command are what reads the text behind an option
        found = {name: obj} if inspect.isfunction(obj) else {}
        for cls in obj.__mro__ if inspect.isclass(obj) else ():
            if not cls.__module__.startswith('fastai_smooth'): continue
            for k, v in vars(cls).items():
                f = v.fget if isinstance(v, property) else getattr(v, '__func__', v)
                if (k[0] != '_' or k in ('__init__', '__call__')) and inspect.isfunction(f): found[f'{cls.__name__}.{k}'] = f
        for where, f in found.items():
            signature = inspect.signature(f)
            if signature.return_annotation is signature.empty: yield f'{m}: {where} has no type of its result'
            yield from (f'{m}: {where}({k}) has no type' for k, p in signature.parameters.items() if p.annotation is p.empty and k not in ('self', 'cls'))


def test_public_signatures_are_typed():
    missing = sorted(set(untyped()))
    assert not missing, '\n'.join(missing)


def test_what_a_checker_is_not_to_see_is_little_and_says_why():
    lines = [line for m in MODULES for line in source_of(m).splitlines() if 'type: ignore' in line]
    assert len(lines) <= 12 and all(re.search(r'# type: ignore\[[\w-]+\] # \S+', line) for line in lines), '\n'.join(lines)


@pytest.mark.processes
def test_readme_is_the_index():
    subprocess.run([sys.executable, str(ROOT/'.ci'/'readme.py'), '--check'], check=True)


def test_readme_shows_what_the_command_printed():
    "`python tests/benchmarks/readme.py` writes the files, the index reads them"
    for p in (ROOT/'nbs'/'figures').glob('compare_*.txt'):
        shown, printed = (' '.join(f.read_text(encoding='utf-8').split()) for f in (ROOT/'README.md', p))
        assert printed in shown, f'README is older than {p.name}'


def test_the_sidebar_lists_every_notebook_in_order():
    listed = re.findall(r'- (\S+\.ipynb)', (ROOT/'nbs'/'sidebar.yml').read_text(encoding='utf-8'))
    assert [n for n in listed if n[0].isdigit()] == [p.name for p in NOTEBOOKS.values()]
    assert {n for n in listed if not n[0].isdigit()} == {'index.ipynb', *(f'tutorials/{p.name}' for p in (ROOT/'nbs'/'tutorials').glob('*.ipynb'))}


def test_no_machine_paths_or_addresses():
    for p in [*ROOT.glob('*.md'), *ROOT.glob('nbs/**/*.ipynb'), *ROOT.glob('fastai_smooth/**/*.py'), *ROOT.glob('.ci/*')]:
        found = re.findall(r'(?<![\w.])/(?:work|root|home|tmp)/\w+|site-packages', p.read_text(encoding='utf-8'))
        assert not found, f'{p.name}: {found[:3]}'


def test_links_between_pages_lead_somewhere():
    "Text of notebooks and of the files beside README"
    pages = [(ROOT/name, (ROOT/name).read_text(encoding='utf-8')) for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
    for p in (ROOT/'nbs').rglob('*.ipynb'):
        pages += [(p, ''.join(c['source'])) for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
    links = [(p, link) for p, text in pages for link in re.findall(r'\]\((?!\w+:)([^)#\s]+)', text) if re.search(r'\.\w+$', link)]
    assert len(links) > 50
    assert not [f'{p.name}: {link}' for p, link in links if not (p.parent/link).exists()]
