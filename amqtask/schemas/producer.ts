import { randomUUID } from "node:crypto";
import { hostname } from "node:os";
import { connect, type ChannelModel, type ConfirmChannel } from "amqplib";

interface Place {
  positional: string[];
  exchange?: string;
  routingKey?: string;
}

export type TaskName = keyof Tasks;
type RestOf<Name extends TaskName> = Tasks[Name] extends { rest: infer Rest } ? Rest : never;

/** `queue`: for tasks that only their arguments route, or for another place than usual. */
export interface CallOptions {
  queue?: string;
  eta?: Date;
  expires?: Date;
  priority?: number;
  taskId?: string;
  ignoreResult?: boolean;
}

/** The broker has no queue for the message: start a worker, or run `amqtask topology declare`. */
export class Unroutable extends Error {}

/** Publishes calls. Each is confirmed by the broker before its promise is fulfilled, or rejected with the reason. */
export class Producer {
  private returned = new Set<string>();

  private constructor(
    private connection: ChannelModel,
    private channel: ConfirmChannel,
  ) {
    channel.on("return", (message) => this.returned.add(String(message.properties.correlationId)));
    // A channel or connection that is lost rejects what waits for its confirm, and each call after that.
    channel.on("error", () => undefined);
    connection.on("error", () => undefined);
  }

  /** `url`: amqp://user:password@host/vhost */
  static async connect(url: string): Promise<Producer> {
    const connection = await connect(url);
    return new Producer(connection, await connection.createConfirmChannel());
  }

  /** Call a task; the id of the call. */
  async call<Name extends TaskName>(
    name: Name,
    args: Tasks[Name]["arguments"],
    options: CallOptions & { rest?: RestOf<Name> } = {},
  ): Promise<string> {
    const place = places[name];
    const exchange = options.queue === undefined ? place.exchange : "";
    const routingKey = options.queue ?? place.routingKey;
    if (exchange === undefined || routingKey === undefined) {
      throw new Error(`where ${name} goes depends on its arguments: say { queue: … }`);
    }
    const kwargs: Record<string, unknown> = { ...args };
    const positional: unknown[] = [];
    for (const parameter of place.positional) {
      if (kwargs[parameter] === undefined) break;
      positional.push(kwargs[parameter]);
      delete kwargs[parameter];
    }
    positional.push(...((options.rest as unknown[] | undefined) ?? []));
    const id = options.taskId ?? randomUUID();
    const body = [positional, kwargs, { callbacks: null, errbacks: null, chain: null, chord: null }];
    await this.publish(exchange, routingKey, Buffer.from(JSON.stringify(body)), id, {
      lang: "js",
      task: name,
      id,
      root_id: id,
      parent_id: null,
      group: null,
      retries: 0,
      eta: options.eta?.toISOString() ?? null,
      expires: options.expires?.toISOString() ?? null,
      timelimit: [null, null],
      argsrepr: JSON.stringify(positional).slice(0, 1024),
      kwargsrepr: JSON.stringify(kwargs).slice(0, 1024),
      origin: `${process.pid}@${hostname()}`,
      ignore_result: options.ignoreResult ?? false,
    }, options.priority ?? 0);
    return id;
  }

  async close(): Promise<void> {
    await this.connection.close();
  }

  private publish(
    exchange: string,
    routingKey: string,
    body: Buffer,
    id: string,
    headers: Record<string, unknown>,
    priority: number,
  ): Promise<void> {
    const options = {
      headers,
      priority,
      mandatory: true,
      persistent: true,
      contentType: "application/json",
      contentEncoding: "utf-8",
      correlationId: id,
    };
    return new Promise((resolve, reject) => {
      this.channel.publish(exchange, routingKey, body, options, (error) => {
        if (error) reject(error);
        else if (this.returned.delete(id)) reject(new Unroutable(`no queue for ${exchange}/${routingKey}`));
        else resolve();
      });
    });
  }
}
