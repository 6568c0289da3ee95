"""A verb that is a noun: `ratoon runs` lists, `ratoon runs NAME` shows one; `list` and `show` may be said too."""

from __future__ import annotations

import click


class Noun(click.Group):
    """Nothing, or options alone, mean `list`; a word that is no command means `show WORD`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] not in (["-h"], ["--help"]):
            if not args or args[0].startswith("-"):
                args = ["list", *args]
            elif args[0] not in self.commands:
                args = ["show", *args]
        return super().parse_args(ctx, args)
