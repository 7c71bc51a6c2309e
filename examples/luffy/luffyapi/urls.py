from django.urls import re_path
from users.views import SMSAPIView

urlpatterns = [re_path(r"^users/sms/(?P<mobile>1[3-9]\d{9})/$", SMSAPIView.as_view())]
