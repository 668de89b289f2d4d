"A world that is made in seconds: the skill world, hardly trained."
from dataclasses import replace

from c2c_nb.toy import SkillWorld, register_world


@register_world
class TinyWorld(SkillWorld):
    name = 'tiny'

    def __init__(self, seed=0, fail=False):
        super().__init__(seed)
        self.kwargs, self.fail = dict(fail=fail), fail

    def recipe(self, role): return replace(super().recipe(role), steps=4, batch=8)

    def lessons(self, role, progress, n, rng):
        if self.fail and role == 'receiver' and n < 16 and progress > .6: raise RuntimeError('no more lessons')
        return super().lessons(role, progress, n, rng)
