from django.contrib import admin
from django.urls import path
from notices import views

urlpatterns = [
    path("admin/", admin.site.urls),
    path("notify/", views.notify),
    path("results/<uuid:task_id>/", views.result),
]
