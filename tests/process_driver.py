"Runs of the tiny models, one after the other: accelerate launch ... process_driver.py JOBS, a JSON list of {folder, values, sharers, resume, kill: [rank, step]}. Prints what each process wrote to the folders."
import json, os, signal, sys

import torch
from torch.distributed.tensor import DTensor

from c2c_nb import train as room
from tiny_train import questions, recipe, task
from c2c_nb.train import Trainer

torch.set_num_threads(1)
room.plot_run = lambda *args: None                               # seconds, and the same everywhere
rank, wrote, spread = int(os.environ['RANK']), [], None


def watch(event, args):
    "Note what is written into a job's folder."
    path = str(args[0]) if args else ''
    writes = event in ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir') or event == 'open' and (set(args[1] or '') & set('wax+') or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    if writes and any(path.startswith(job['folder']) for job in jobs): wrote.append(path)


jobs = json.loads(sys.argv[1])
sys.addaudithook(watch)
for job in jobs:
    made = recipe(job['folder'], *job.get('values', ()), sharers=job.get('sharers', 1))
    it = Trainer(made, job.get('resume', False), task=task(made, fresh=True), progress=False).start()
    assert it.world == 2 and it.rank == rank
    if job.get('kill'):
        before_step = it.task.before_step
        def die(step, steps):
            if [rank, step] == job['kill']: os.kill(os.getpid(), signal.SIGKILL)
            before_step(step, steps)
        it.task.before_step = die
    it.fit()
    if made.model.shard:
        whole, parts = ([p for m in it.task.models for n, p in m.named_parameters() if isinstance(p, DTensor) == cut] for cut in (False, True))
        spread = dict(weights=sum(p.numel() for p in whole + parts), here=sum(p.numel() for p in whole) + sum(p.to_local().numel() for p in parts), said=it.task.answer(questions, 8))
os.write(1, (json.dumps(dict(rank=rank, wrote=len(wrote), what=wrote[:3], spread=spread)) + '\n').encode())    # in one piece
