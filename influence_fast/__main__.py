"""``python -m influence_fast``, so that launchers such as torchrun can start the command line."""

from influence_fast.cli.main import main

main()
