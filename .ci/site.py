#!/usr/bin/env python
"Write the notebooks with their stored outputs as a folder of plain HTML pages, which need neither a network nor scripts: .ci/site.py OUTDIR"
import ast
import html
import importlib
import inspect
import operator
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import yaml
from fastcore.docments import docments
from math_core import LatexError, LatexToMathML
from nbconvert.filters import ansi2html
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbdev.config import get_config, nbpath2html
from nbdev.showdoc import showdoc_nm
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parent.parent
NBS, CFG = ROOT/'nbs', get_config(path=ROOT)
HOME = f'{CFG.doc_host}{CFG.doc_baseurl}/'
THEIRS = re.compile(r"((?:torch|fastai|timm|Composer|MONAI)(?:'s)?(?:[*]{2})? )`([^`]+)`") # namesakes, which are not to be linked to ours


def box(content, kind=''): return f'<div class="scroll{kind and " "+kind}" tabindex="0">{content}</div>\n'
def plain(markup): return html.unescape(re.sub(r'<[^>]*>', '', markup))
def unlinked(markup): return re.sub(r'</?a\b[^>]*>', '', markup)


def breakable(
    markup:str, # HTML
)->str: # The same, in which long names may be broken at their parts
    "Names for narrow places"
    parts = re.split(r'(<[^>]*>)', markup)
    return ''.join(p if p.startswith('<') else re.sub(r'(?<=[a-z])(?=[A-Z])|(?<=[_.(/=])(?=\w)', '<wbr>', p) for p in parts)


class Renderer(IPythonRenderer):
    "Markdown as nbconvert renders it, with formulas as MathML, links between pages, anchors, and boxes for what is wide"
    mathml = LatexToMathML(fancy_error=False)

    def __init__(self,
        page, # Whose cells these are
        site, # All of it
    ):
        super().__init__(escape=False)
        self.page, self.site, self.headings, self.ids = page, site, [], {anchor for anchor, _ in page.names.values()}

    def formula(self,
        tex:str, # LaTeX without the dollars
        display:bool, # On a line of its own
    )->str: # MathML
        "A formula that cannot be converted is an error"
        try: return self.mathml.convert_with_local_state(tex, displaystyle=display)
        except LatexError as e: raise ValueError(f'{self.page.path}: cannot convert the formula {tex!r}: {e}') from None

    def inline_math(self, body): return self.formula(body, False)
    def block_math(self, body): return f'<span class="formula scroll" tabindex="0">{self.formula(body, True)}</span>'
    def latex_environment(self, name, body): return self.block_math(f'\\begin{{{name}}}{body}\\end{{{name}}}')
    def table(self, text): return box(f'<table>\n{text}</table>')
    def block_code(self, code, info=None): return box(super().block_code(code, info), 'code')
    def link(self, text, url, title=None): return super().link(unlinked(text), self.site.link(self.page, url), title)
    def image(self, text, url, title=None): return super().image(text, url if url.startswith('data:') else self.site.link(self.page, url), title)

    def codespan(self, text):
        code = breakable(super().codespan(text))
        name = re.match(r'[\w.]+(?=\(|$)|', text)[0] # of what is mentioned or called
        if name not in self.site.names and (name != text or name[:1].isupper()): name = name.split('.')[0]
        url = self.site.names.get(name)
        return f'<a href="{self.page.up}{url}">{code}</a>' if url else code

    def heading(self, text, level, **attrs):
        text = unlinked(text)
        slug = re.sub(r'[^\w.]+', '-', plain(text).lower()).strip('-')
        while slug in self.ids: slug += '-1' # also where a name of the module has it
        self.ids.add(slug)
        self.headings.append((level, slug, text))
        return f'<h{level} id="{slug}">{breakable(text)}<a class="anchor" href="#{slug}" aria-label="Link to this heading">#</a></h{level}>\n'


def cell_text(text): return ' '.join(text.split()).replace('|', '&#124;')


def type_name(
    annotation, # Of a parameter
)->str: # Markdown; '' for none, and for that of a default None
    "A type without its modules"
    if annotation in (inspect.Parameter.empty, type(None)): return ''
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return f'<code>{cell_text(re.sub(r"[a-zA-Z_]+[.]", "", name))}</code>'


def is_shown(
    m, # Attribute of a class
)->bool: # Whether it is a method with a docstring and a docment on each parameter; those without are for the library itself
    "Whether readers want to know"
    f = m.__func__ if isinstance(m, (classmethod, staticmethod)) else m
    return inspect.isfunction(f) and bool(f.__doc__) and all(d.docment for k, d in docments(f, full=True).items() if k not in ('self', 'cls', 'return'))


def entry(
    name:str, # Qualified name within its module
    anchor:str, # Of the heading
    obj, # Function or class
    level:int=3, # Of the heading
)->str: # Markdown
    "What nbdev's `show_doc` says, with a table of the parameters, and the methods of a class"
    parameters = [p.replace(annotation=p.empty) for k, p in inspect.signature(obj).parameters.items() if k not in ('self', 'cls')]
    rows = [f'| {"returns" if k == "return" else f"`{k}`"} | {type_name(d.anno)} | {cell_text(d.docment)} |'
            for k, d in docments(obj, full=True).items() if d.docment]
    text = [f'<h{level} class="api" id="{anchor}">{breakable(name)}</h{level}>', '', '```python', f'{name}{inspect.Signature(parameters)}', '```', '',
            inspect.getdoc(obj) or '', '', *(['| | type | |', '|---|---|---|', *rows] if rows else []), '']
    methods = [(n, getattr(obj, n)) for n, m in vars(obj).items() if n[0] != '_' and is_shown(m)] if isinstance(obj, type) else []
    if methods:
        text += [f'<details class="methods"><summary>Methods: {", ".join(n for n, _ in methods)}</summary>', '',
                 '\n'.join(entry(f'{name}.{n}', f'{anchor}.{n}', m, level+1) for n, m in methods), '</details>', '']
    return '\n'.join(text)


class Page:
    "One notebook, and where its page goes"
    def __init__(self,
        section, # Heading in the list of pages, or None
        path:str, # Of the notebook below nbs
    ):
        self.section, self.path = section, path
        self.url, self.up = nbpath2html(Path(path)).as_posix(), '../'*path.count('/')
        self.cells = nbformat.read(NBS/path, as_version=4).cells
        self.title, self.about = re.search(r'^# (.+)', self.cells[0].source, re.M)[1], re.search(r'^> (.+)', self.cells[0].source, re.M)[1]
        module = re.search(r'^#\| *default_exp (\S+)', '\n'.join(c.source for c in self.cells), re.M)
        self.module = importlib.import_module(f'{CFG.lib_name}.{module[1]}') if module else None
        self.names = {} # what is defined here for users: its anchor, and itself
        for cell in self.cells:
            cell.directives = dict(re.findall(r'^#\| *([\w-]+):? *(.*)$', cell.source, re.M)) if cell.cell_type == 'code' else {}
            if 'export' not in cell.directives: continue
            for n in self.defined(cell):
                if re.search(r'(^|\.)_', n): continue
                taken = [anchor for anchor, _ in self.names.values()]
                self.names[n] = n.lower() + '-1'*(n.lower() in taken), operator.attrgetter(n)(self.module) # Recipe and recipe

    def defined(self,
        cell, # Of code
    )->list: # Of qualified names
        "The functions and classes of a cell"
        return [showdoc_nm(o) for o in ast.parse(cell.source).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))]

    def body(self,
        site, # Of which it is a page
    )->tuple: # HTML, and the headings as (level, id, text)
        "What a reader sees: nothing hidden, no directives, exported code folded below what it defines"
        renderer, parts, before = Renderer(self, site), [], ''
        markdown = MarkdownWithMath(renderer)
        for cell in self.cells:
            if cell.cell_type == 'markdown':
                renderer.attachments = cell.get('attachments', {})
                parts.append(markdown.render(THEIRS.sub(lambda m: f'{m[1]}<code>{html.escape(m[2])}</code>', cell.source)))
                paragraphs = [' '.join(plain(p).split()) for p in re.findall(r'<p>(.*?)</p>', parts[-1], re.S)]
                before = re.split(r'(?<=[.?!]) (?=[A-Z])', paragraphs[-1])[-1].rstrip(':') if paragraphs else ''
            elif cell.cell_type == 'code' and not cell.directives.keys() & {'hide', 'default_exp'}:
                source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
                code = renderer.block_code(source, 'python') if source else ''
                if cell.directives.keys() & {'export', 'exporti', 'exports'}:
                    names = self.defined(cell)
                    parts += [markdown.render(entry(n, *self.names[n])) for n in names if n in self.names and 'export' in cell.directives]
                    code = f'<details><summary>{": ".join(filter(None, ["Source", ", ".join(n for n in names if n != "_")]))}</summary>\n{code}</details>\n'
                if cell.directives.get('echo') != 'false': parts.append(code)
                alt = cell.directives.get('fig-alt') or ': '.join(filter(None, [plain(renderer.headings[-1][2]), before]))
                parts += [f'<div class="output">{o}</div>\n' for o in map(lambda o: self.output(o, alt, renderer), cell.outputs) if o]
        return ''.join(parts).replace('<blockquote>', '<blockquote class="about">', 1), renderer.headings

    def output(self,
        o, # Of a cell
        alt:str, # Text for pictures
        renderer, # Of Markdown
    )->str: # HTML
        "The richest form of an output that is stored"
        data = {'text/plain': re.sub(r'[^\n]*\r(?=[^\n])', '', o.text)} if 'text' in o else o.get('data', {}) # of a progress bar the last state
        for kind in ('image/png', 'image/jpeg'):
            if kind in data: return box(f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{"".join(data[kind].split())}">')
        if 'image/svg+xml' in data: return box(data['image/svg+xml'])
        if 'text/html' in data: return box(re.sub(r'<style.*?</style>', '', data['text/html'], flags=re.S))
        if 'text/markdown' in data: return MarkdownWithMath(renderer).render(data['text/markdown'])
        return box(f'<pre>{ansi2html(data["text/plain"])}</pre>') if 'text/plain' in data else ''


class Site:
    "All pages, in the order of nbs/sidebar.yml"
    def __init__(self,
        out:Path, # Folder for the site
    ):
        listed = []
        for item in yaml.safe_load((NBS/'sidebar.yml').read_text())['website']['sidebar']['contents']:
            listed += [(None, item)] if isinstance(item, str) else [(item['section'], o) for o in item['contents']]
        there = {p.relative_to(NBS).as_posix() for p in NBS.rglob('[!.]*.ipynb') if '.ipynb_checkpoints' not in p.parts}
        if differ := sorted({o for _, o in listed} ^ there): raise ValueError(f'nbs/sidebar.yml and the notebooks in nbs differ by {", ".join(differ)}')
        self.out, self.pages = out, [Page(*o) for o in listed]
        self.by_path = {p.path: p for p in self.pages}
        self.names = {name: f'{p.url}#{anchor}' for p in self.pages for name, (anchor, _) in p.names.items()}

    def link(self,
        page:Page, # Where it stands
        url:str, # As it stands in the notebook
    )->str: # As it must stand in the page
        "Notebooks become pages, files beside them are copied, other files of the project are those on GitHub"
        if url.startswith(HOME): return page.up + url.removeprefix(HOME)
        parts = urlsplit(url)
        if parts.scheme or not parts.path: return url
        target = (NBS/page.path).parent.joinpath(parts.path).resolve()
        if not target.exists(): raise ValueError(f'{page.path} links to {url}, which is not there')
        if NBS not in target.parents: return f'{CFG.git_url}/{"tree" if target.is_dir() else "blob"}/{CFG.branch}/{target.relative_to(ROOT).as_posix()}'
        name = target.relative_to(NBS).as_posix()
        if name in self.by_path: return page.up + self.by_path[name].url + (f'#{parts.fragment.lower()}' if parts.fragment else '')
        (self.out/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(target, self.out/name)
        return page.up + name

    def navigation(self,
        here:Page, # Where it stands
        headings:list, # Of that page, as (level, id, text)
    )->str: # HTML
        "The list of all pages, with the headings of this one"
        res = []
        for section in dict.fromkeys(p.section for p in self.pages):
            res += [f'<h2>{section}</h2>' if section else '', '<ul>']
            for p in (p for p in self.pages if p.section == section):
                inside = ''.join(f'<li><a href="#{i}">{breakable(text)}</a></li>' for level, i, text in headings if level == 2) if p is here else ''
                link = f'<a href="{here.up}{p.url}"{" aria-current=page" if p is here else ""}>{html.escape(p.title)}</a>'
                res.append(f'<li>{link}{f"<ul>{inside}</ul>" if inside else ""}</li>')
            res.append('</ul>')
        return '\n'.join(res)

    def write(self):
        "Write all pages and their style"
        template, css = ((ROOT/'.ci'/name).read_text(encoding='utf-8') for name in ('site.html', 'site.css'))
        for before, p, after in zip([None, *self.pages], self.pages, [*self.pages[1:], None]):
            body, headings = p.body(self)
            prev, nxt = (f'<a rel="{rel}" href="{p.up}{o.url}">{html.escape(o.title)}</a>' if o else '' for rel, o in (('prev', before), ('next', after)))
            title = ' – '.join(dict.fromkeys([p.title, CFG.lib_name]))
            (self.out/p.url).parent.mkdir(parents=True, exist_ok=True)
            page = template.format(title=html.escape(title), about=html.escape(p.about), up=p.up, lib=CFG.lib_name, body=body, before=prev, after=nxt,
                                   source=f'{CFG.git_url}/blob/{CFG.branch}/nbs/{p.path}', pages=self.navigation(p, headings))
            (self.out/p.url).write_text(page, encoding='utf-8')
        light, dark = (HtmlFormatter(style=s).get_style_defs('.highlight') for s in ('default', 'github-dark'))
        (self.out/'style.css').write_text(f'{css}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n', encoding='utf-8')


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    try: Site(Path(sys.argv[1])).write()
    except ValueError as e: sys.exit(str(e))
