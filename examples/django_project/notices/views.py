from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST
from project_name import celery_app

from .tasks import send_dingtalk_message


@csrf_exempt
@require_POST
def notify(request):
    """Send a message, without waiting for it."""
    task = send_dingtalk_message.delay(request.POST["message"])
    return JsonResponse({"task": task.id}, status=202)


def result(request, task_id):
    """What came of it."""
    found = celery_app.AsyncResult(str(task_id))
    return JsonResponse({"state": found.state})
