"A Hugging Face hub in a thread: repositories in memory, with just the requests that huggingface_hub makes to create, commit to and download them."
import base64, contextlib, hashlib, json, re, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    "What the server holds: for each repository its commits, {revision: {path: bytes}}, `main` being a name of the last one; which are gated; and the requests made."
    def __init__(self): self.repos, self.gated, self.asked = {}, set(), []

    def commit(self, repo:str, files:dict, branch:str='main') -> str:
        "Add files, as a commit."
        commits = self.repos.setdefault(repo, {'main': {}})
        commits[branch] = commits.get(branch, commits['main']) | files
        sha = hashlib.sha1(repr(sorted(commits[branch].items())).encode()).hexdigest()
        commits[sha] = commits[branch]
        return sha

    def sha(self, repo, revision): return next(r for r, files in self.repos[repo].items() if len(r) == 40 and files is self.repos[repo][revision])


@contextlib.contextmanager
def fake_hub():
    "A running hub; yields it and its address."
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'
        def log_message(self, *args): pass

        def answer(self, body=b'', code=200, **headers):
            if not isinstance(body, bytes): body = json.dumps(body).encode(); headers['Content-Type'] = 'application/json'
            self.send_response(code)
            for k, v in ({'Content-Length': len(body)} | {k.replace('_', '-'): v for k, v in headers.items()}).items(): self.send_header(k, str(v))
            self.end_headers()
            if self.command != 'HEAD': self.wfile.write(body)

        def missing(self, kind, code=404): self.answer({'error': kind}, code, X_Error_Code=kind)

        def read(self):
            if self.headers.get('Transfer-Encoding') != 'chunked': return self.rfile.read(int(self.headers.get('Content-Length') or 0))
            out = b''
            while n := int(self.rfile.readline(), 16): out += self.rfile.read(n); self.rfile.readline()
            self.rfile.readline()
            return out

        def do_GET(self):
            path = unquote(urlparse(self.path).path)
            hub.asked.append(f'{self.command} {path}')
            if m := re.fullmatch(r'/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?(?:/.*)?', path):
                repo, what, revision = m[1], m[2], m[3] or 'main'
                if repo in hub.gated: return self.missing('GatedRepo', 403)
                if repo not in hub.repos: return self.missing('RepoNotFound')
                if revision not in hub.repos[repo]: return self.missing('RevisionNotFound')
                files = hub.repos[repo][revision]
                if what == 'tree': return self.answer([dict(type='file', path=n, size=len(b), oid=hashlib.sha1(b).hexdigest()) for n, b in files.items()])
                return self.answer(dict(id=repo, sha=hub.sha(repo, revision), siblings=[dict(rfilename=n) for n in files], private=False, disabled=False, gated=False, downloads=0, likes=0, tags=[]))
            if m := re.fullmatch(r'/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)', path):
                repo, revision, name = m.groups()
                if repo in hub.gated: return self.missing('GatedRepo', 403)
                if repo not in hub.repos: return self.missing('RepoNotFound')
                if revision not in hub.repos[repo]: return self.missing('RevisionNotFound')
                if name not in hub.repos[repo][revision]: return self.missing('EntryNotFound')
                data = hub.repos[repo][revision][name]
                return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=hub.sha(repo, revision), Accept_Ranges='bytes')
            self.missing('EntryNotFound')
        do_HEAD = do_GET

        def do_POST(self):
            path, body = unquote(urlparse(self.path).path), self.read()
            hub.asked.append(f'POST {path}')
            if path == '/api/repos/create':
                asked = json.loads(body)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                if name in hub.repos: return self.answer({'error': 'exists', 'url': f'{address}/{name}'}, 409)
                hub.commit(name, {'.gitattributes': b''})
                return self.answer(dict(url=f'{address}/{name}', name=name, id=name))
            if path == '/api/validate-yaml': return self.answer(dict(errors=[], warnings=[]))
            if m := re.fullmatch(r'/api/models/([\w.-]+/[\w.-]+)/preupload/([^/]+)', path):
                return self.answer(dict(files=[dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]))
            if m := re.fullmatch(r'/api/models/([\w.-]+/[\w.-]+)/commit/([^/]+)', path):
                lines = [json.loads(line) for line in body.splitlines()]
                sha = hub.commit(m[1], {x['value']['path']: base64.b64decode(x['value']['content']) for x in lines if x['key'] == 'file'}, m[2])
                return self.answer(dict(success=True, commitOid=sha, commitUrl=f'{address}/{m[1]}/commit/{sha}', hookOutput=''))
            self.missing('EntryNotFound')

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    address = f'http://127.0.0.1:{server.server_address[1]}'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield hub, address
    finally: server.shutdown(); server.server_close()
