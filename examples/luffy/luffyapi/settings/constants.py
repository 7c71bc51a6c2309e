# How long a code is valid, and how soon the next one may be asked for, in seconds.
SMS_EXPIRE_TIME = 300
SMS_INTERVAL_TIME = 60
SMS_TEMPLATE_ID = 1
