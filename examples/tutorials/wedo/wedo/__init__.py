from amqtask import AmqTask

app = AmqTask("wedo")
app.config_from_object("wedo.config")
