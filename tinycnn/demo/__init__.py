"""A page that shows what a network computes: `python -m tinycnn demo RUN`.

    demo.write([demo.from_run("runs/default/...")], "page.html")
    demo.write([demo.from_model(model)], "page.html")

It is one HTML file with the weights inside, in which a visitor draws and sees the output of every layer.  It needs no
server, loads nothing, and its content security policy forbids all connections.  The arithmetic is in layers.js.
"""

from tinycnn.demo._net import Net as Net, from_model as from_model
from tinycnn.demo._page import write as write
from tinycnn.demo._run import SHIPPED as SHIPPED, from_run as from_run
