"""``ukai-ctl``: what an administrator types.  It owns nothing and speaks only the control protocol.

``main`` is the root command, ``params`` what all commands take, ``client`` the way to metad, ``schema`` the keys
of ``--json``, ``render`` the look, ``follow`` the consumer of log and metrics; ``commands`` holds one file per verb.
"""
