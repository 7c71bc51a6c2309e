"""Canvas: partials, immutability, chains, groups, chords, maps, chunks, errors, replacement."""

import json

from amqtask import chain, chord, group, signature
from proj.celery import app
from proj.tasks import add, becomes, fail, mul, on_error, same, seen, xsum


def get(composed):
    return composed.apply_async().get(timeout=30)


def main():
    found = {}
    found["signature"] = get(signature("proj.tasks.add", args=(2, 2), app=app))
    found["dictionary"] = get(signature(json.loads(json.dumps(add.s(2, 3))), app=app))
    found["partial"] = add.s(4).apply_async((6,)).get(timeout=30)
    found["merged"] = add.s(x=1).clone(kwargs={"y": 9}).kwargs
    found["immutable"] = get(add.s(2, 2) | same.si("alone"))
    found["chain"] = get(chain(add.s(2, 2), add.s(4), add.s(8)))
    steps = (add.s(2, 2) | add.s(4) | add.s(8)).apply_async()
    found["parents"] = [steps.get(timeout=30), steps.parent.get(timeout=30), steps.parent.parent.get(timeout=30)]
    members = group(add.s(i, i) for i in range(3)).apply_async()
    found["group"] = members.get(timeout=30)
    found["of a group"] = [
        members.ready(),
        members.successful(),
        members.failed(),
        members.completed_count(),
        len(members),
    ]
    found["mixed"] = members.join(timeout=30)
    body = chord((add.s(i, i) for i in range(5)), xsum.s()).apply_async()
    found["chord"] = body.get(timeout=30)
    found["header"] = body.parent.get(timeout=30)
    found["nested"] = get(chain(add.s(1, 1), group(add.s(i) for i in range(3)), xsum.s(), mul.s(2)))
    found["chain in chord"] = get(chord([add.s(1, 1) | mul.s(3), add.s(2, 2)], xsum.s()))
    found["group in chain"] = get(same.s(1) | group(add.s(1), mul.s(5)))
    found["chord in chord"] = get(chord([chord([add.s(1, 1), add.s(2, 2)], xsum.s()), same.s(4)], xsum.s()))
    found["map"] = xsum.map([[1, 2], [3, 4]]).apply_async().get(timeout=30)
    found["starmap"] = add.starmap(zip(range(3), range(3))).apply_async().get(timeout=30)
    found["chunks"] = add.chunks(zip(range(5), range(5)), 2)().get(timeout=30)
    found["replaced"] = get(becomes.s(1) | add.s(5))
    found["skew"] = [
        task.options["countdown"] for task in group(add.s(i, i) for i in range(3)).skew(start=1, stop=10).tasks
    ]

    for name, composed in {
        "error in a chain": add.s(1, 1) | fail.s() | add.s(1),
        "error in a group": group(add.s(1, 1), fail.s()),
        "error in a header": chord([add.s(1, 1), fail.s()], xsum.s()),
        "error in a body": chord([add.s(1, 1)], fail.s()),
    }.items():
        try:
            get(composed)
        except Exception as error:
            found[name] = repr(error)
    failing = fail.s()
    failing.link_error(on_error.s())
    failed = failing.apply_async()
    found["errback"] = seen.blpop(["guide-errors-" + failed.id], timeout=30)[1].decode()
    joined = chord([add.s(1, 1), fail.s()], xsum.s().on_error(on_error.s())).apply_async()
    told = seen.blpop(["guide-errors-" + joined.id], timeout=30)
    found["errback of a chord"] = "on purpose" in told[1].decode()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
