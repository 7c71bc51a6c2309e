import json
import logging
import urllib.request

from django.conf import settings

log = logging.getLogger("django")


class CCP:
    """Sends text messages through a gateway; stands in for the provider's own client."""

    def send_template_sms(self, mobile, datas, template_id):
        """Whether the gateway took it."""
        if not settings.SMS_GATEWAY:
            log.warning("SMS_GATEWAY is not set: %s to %s", datas, mobile)
            return True
        body = json.dumps({"to": mobile, "datas": datas, "templateId": template_id}).encode()
        request = urllib.request.Request(settings.SMS_GATEWAY, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False
