"""`vmfs web`: the machines of a mount as a web page. It is a client of the directory, and a process of its own.

The modules: `command` starts it, `gate` lets in the requests that have the token, `app` has the routes, `live` feeds a
page, `panes` reads what a page shows, `actions` does what its buttons do, `streams` joins consoles and screens to it,
`uploads` makes machines of files that are dropped on it. `static` is the page.
"""
