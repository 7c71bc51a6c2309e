import random

from django_redis import get_redis_connection
from luffyapi.settings import constants
from rest_framework import status
from rest_framework.response import Response
from rest_framework.views import APIView


class SMSAPIView(APIView):
    def get(self, request, mobile):
        # 1. Was a message sent to this number less than 60 seconds ago?
        redis_conn = get_redis_connection("sms_code")
        ret = redis_conn.get(f"mobile_{mobile}")
        if ret is not None:
            return Response({"msg": "60秒内已经发送过短信了"}, status=status.HTTP_400_BAD_REQUEST)
        # 2. Make a code.
        sms_code = f"{random.randint(1, 999999):06d}"

        pipe = redis_conn.pipeline()
        pipe.multi()
        pipe.setex(f"sms_{mobile}", constants.SMS_EXPIRE_TIME, sms_code)
        pipe.setex(f"mobile_{mobile}", constants.SMS_INTERVAL_TIME, "_")
        pipe.execute()
        try:
            from mycelery.sms.tasks import send_sms  # noqa: PLC0415 - as the tutorial has it

            ret = send_sms.delay(mobile, sms_code)
            print("ret>>>", ret.get(timeout=30))
        except Exception:  # noqa: BLE001 - as the tutorial has it
            return Response({"msg": "发送短信失败"}, status=status.HTTP_500_INTERNAL_SERVER_ERROR)
        return Response({"msg": "发送短信成功"})
