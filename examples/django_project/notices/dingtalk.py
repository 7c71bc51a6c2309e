import json
import logging
import urllib.request

from django.conf import settings

logger = logging.getLogger(__name__)


def send(message):
    """Post a message to the robot of a DingTalk group."""
    if not settings.DINGTALK_WEBHOOK:
        logger.warning("DINGTALK_WEBHOOK is not set: %s", message)
        return
    body = json.dumps({"msgtype": "text", "text": {"content": message}}).encode()
    request = urllib.request.Request(settings.DINGTALK_WEBHOOK, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()
