"""Next steps: a project, signatures, the primitives."""

import json

from amqtask import chain, chord, group
from proj.tasks import add, fail, flaky, mul, progress, xsum


def main():
    found = {}
    found["call"] = add(2, 2)
    found["delay"] = add.delay(2, 2).get(timeout=30)
    found["apply_async"] = add.apply_async((2, 2), queue=add.app.conf.task_default_queue, countdown=0.2).get(timeout=30)
    result = fail.delay()
    found["propagate"] = repr(result.get(timeout=30, propagate=False))
    found["failed"] = [result.failed(), result.successful(), result.state]

    partial = add.s(2)
    found["partial"] = partial.delay(8).get(timeout=30)
    found["signature"] = repr(add.signature((2, 2), countdown=10))
    found["options"] = add.signature((2, 2), countdown=10).options
    found["keyword"] = mul.s(x=3).clone(kwargs={"y": 4}).apply_async().get(timeout=30)

    found["group"] = group(add.s(i, i) for i in range(10))().get(timeout=30)
    found["partial group"] = group(add.s(i) for i in range(5))(10).get(timeout=30)
    found["chain"] = chain(add.s(4, 4) | mul.s(8))().get(timeout=30)
    found["pipe"] = (add.s(4, 4) | mul.s(8))().get(timeout=30)
    found["chord"] = chord((add.s(i, i) for i in range(10)), xsum.s())().get(timeout=30)
    found["group and task"] = (group(add.s(i, i) for i in range(10)) | xsum.s())().get(timeout=30)
    found["retried"] = flaky.delay(2).get(timeout=30)
    found["progress"] = progress.delay(3).get(timeout=30)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
