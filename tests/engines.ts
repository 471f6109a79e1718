/**
 * Real engines for the tests: etcd and Ceph's S3 gateway, as tests/engines/*.sh run them on loopback, in a temporary
 * folder that goes with them. They end with the test's process, however that ends: the script sees its standard input
 * end, and the kernel kills what a script leaves.
 *
 * A start of Ceph takes some seconds: one instance serves all tests of a file, in a bucket each.
 */
import { createHash, createHmac } from "node:crypto";
import { join } from "node:path";
import type { Subprocess } from "bun";
import { authority, pair } from "./certificates.ts";
import { isAlive, killHard, signal, temporaryFolder, waitFor } from "./fixtures.ts";

/** Long enough for a busy machine; a start that fails says so much earlier. */
const START_MS = 100_000;

/** Why there is no etcd, or undefined where there is one. */
export const noEtcd = lacking("etcd", "etcdctl", "setpriv");
/** The same of Ceph. */
export const noCeph = lacking("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "setpriv");

function lacking(...tools: string[]): string | undefined {
  const missing = tools.filter((tool) => Bun.which(tool) === null);
  return missing.length === 0 ? undefined : `${missing.join(", ")} not installed`;
}

// ------------------------------------------------------------------------------------------------------ any engine

/** The processes of an engine; etcd's are called by their number, Ceph's by their name. */
interface Members<Name extends string | number> extends AsyncDisposable {
  /** The script that runs them. */
  script: Subprocess;
  /** Where they keep their data and their logs; it goes with the script. */
  folder: string;
  pid(member: Name): number;
  /** Ends one as kill -9 does, and returns when it is gone. */
  kill(member: Name): Promise<void>;
  /** Asks one to end, and returns when it is gone. */
  stop(member: Name): Promise<void>;
  /** Starts one that is gone on the data that it had, and returns when it answers. */
  restart(member: Name): Promise<void>;
  /** As SIGSTOP: its connections stay, nothing answers. */
  pause(member: Name): void;
  resume(member: Name): void;
}

interface Ready<Pids> {
  pids: Pids;
}

type Answering<Name> = (member: Name) => Promise<boolean>;

async function run<Name extends string | number, Facts extends Ready<Record<Name, number>>>(
  script: string,
  args: string[],
  answering: (facts: Facts) => Answering<Name>,
): Promise<{ facts: Facts; members: Members<Name> }> {
  const folder = temporaryFolder();
  const child = Bun.spawn({
    cmd: [join(import.meta.dir, "engines", script), folder.path, "--remove", ...args],
    stdio: ["pipe", "pipe", "pipe"],
  });
  const errors = new Response(child.stderr).text();
  const lines = linesOf(child.stdout);
  const end = async () => {
    await child.stdin.end();
    await child.exited;
    folder[Symbol.dispose]();
  };
  const timer = setTimeout(() => child.kill(), START_MS);
  const first = await lines.next();
  clearTimeout(timer);
  if (first.done) {
    await end();
    throw new Error(`${script} did not start: ${await errors}`);
  }
  const facts: Facts = JSON.parse(first.value);
  const { pids } = facts;
  const answers = answering(facts);
  const gone = (member: Name) => waitFor(`member ${member} is gone`, () => !isAlive(pids[member]));
  const members: Members<Name> = {
    script: child,
    folder: folder.path,
    pid: (member) => pids[member],
    async kill(member) {
      killHard(pids[member]);
      await gone(member);
    },
    async stop(member) {
      signal(pids[member], "SIGTERM");
      await gone(member);
    },
    async restart(member) {
      child.stdin.write(`start ${member}\n`);
      await child.stdin.flush();
      const { value } = await lines.next();
      pids[member] = JSON.parse(value!).pid;
      await waitFor(`member ${member} answers`, () => answers(member));
    },
    pause: (member) => signal(pids[member], "SIGSTOP"),
    resume: (member) => signal(pids[member], "SIGCONT"),
    [Symbol.asyncDispose]: end,
  };
  return { facts, members };
}

async function* linesOf(stream: ReadableStream<Uint8Array>): AsyncGenerator<string, undefined> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of stream) {
    const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = lines.pop()!;
    yield* lines;
  }
}

/** Whether what is there answers, and says that it is well. */
async function ok(url: string, ca?: string): Promise<boolean> {
  const tls = ca === undefined ? {} : { tls: { ca: Bun.file(ca) } };
  return fetch(url, { ...tls, signal: AbortSignal.timeout(2000) }).then(
    (response) => response.ok,
    () => false,
  );
}

// ------------------------------------------------------------------------------------------------------------ etcd

export interface EtcdOptions {
  /** 1 unless said. */
  members?: number;
  /** Clients talk TLS, to a certificate of the tests' own root. */
  tls?: boolean;
  /** Only the user `root` with this password may read and write. */
  password?: string;
}

export interface Etcd extends Members<number> {
  /** A URL for each member. */
  endpoints: string[];
  /** For --cluster: etcd://127.0.0.1:1,127.0.0.1:2/NAME. */
  url(name: string): string;
  /** The root that signed the members' certificates. */
  ca: string | undefined;
}

/** Returns when all members answer. */
export async function startEtcd({ members = 1, tls = false, password }: EtcdOptions = {}): Promise<Etcd> {
  const args = ["--members", String(members)];
  const ca = tls ? authority() : undefined;
  if (ca !== undefined) args.push("--cert", pair("good").cert, "--key", pair("good").key, "--ca", ca);
  if (password !== undefined) args.push("--user", "root", "--password", password);
  const started = await run<number, Ready<number[]> & { endpoints: string[] }>("etcd.sh", args, ({ endpoints }) => {
    return (member) => ok(`${endpoints[member]}/health`, ca);
  });
  const { endpoints } = started.facts;
  const hosts = endpoints.map((endpoint) => new URL(endpoint).host).join();
  return { ...started.members, endpoints, ca, url: (name) => `etcd://${hosts}/${name}` };
}

// ------------------------------------------------------------------------------------------------------------ Ceph

export interface Ceph extends Members<"mon" | "osd" | "rgw"> {
  endpoint: string;
  /** AWS_*: what a server of ours, and Bun.S3Client, need. */
  env: Record<"AWS_ENDPOINT_URL" | "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY" | "AWS_REGION", string>;
  /** For new Bun.S3Client(). */
  options: { endpoint: string; accessKeyId: string; secretAccessKey: string; region: string };
  createBucket(name: string): Promise<void>;
}

/** Returns when the gateway takes writes. */
export async function startCeph(): Promise<Ceph> {
  type Facts = Ready<Record<"mon" | "osd" | "rgw", number>> &
    Record<"endpoint" | "access" | "secret" | "region", string>;
  const { facts, members } = await run<"mon" | "osd" | "rgw", Facts>("ceph.sh", [], ({ endpoint }) => {
    // A gateway waits for the other two by itself.
    return async (member) => member !== "rgw" || ok(endpoint);
  });
  const { endpoint, access, secret, region } = facts;
  const options = { endpoint, accessKeyId: access, secretAccessKey: secret, region };
  return {
    ...members,
    endpoint,
    options,
    env: {
      AWS_ENDPOINT_URL: endpoint,
      AWS_ACCESS_KEY_ID: access,
      AWS_SECRET_ACCESS_KEY: secret,
      AWS_REGION: region,
    },
    async createBucket(name) {
      const response = await fetchS3(options, "PUT", `/${name}`);
      if (!response.ok) throw new Error(`Bucket "${name}": ${response.status} ${await response.text()}`);
    },
  };
}

/** One signed request with no body, for what Bun's client has no call for. The path must need no escaping. */
export async function fetchS3(
  { endpoint, accessKeyId, secretAccessKey, region }: Ceph["options"],
  method: string,
  path: string,
): Promise<Response> {
  const { host } = new URL(endpoint);
  const time = new Date().toISOString().replace(/[-:]|\.\d+/g, "");
  const scope = `${time.slice(0, 8)}/${region}/s3/aws4_request`;
  const hash = createHash("sha256").digest("hex");
  const headers = { host, "x-amz-content-sha256": hash, "x-amz-date": time };
  const names = Object.keys(headers).join(";");
  const lines = Object.entries(headers).map(([name, value]) => `${name}:${value}\n`);
  const canonical = [method, path, "", lines.join(""), names, hash].join("\n");
  const text = ["AWS4-HMAC-SHA256", time, scope, createHash("sha256").update(canonical).digest("hex")].join("\n");
  const hmac = (key: string | Buffer, value: string) => createHmac("sha256", key).update(value).digest();
  const key = scope.split("/").reduce<string | Buffer>(hmac, `AWS4${secretAccessKey}`);
  const signature = hmac(key, text).toString("hex");
  const authorization = `AWS4-HMAC-SHA256 Credential=${accessKeyId}/${scope},SignedHeaders=${names},Signature=${signature}`;
  return fetch(endpoint + path, { method, headers: { ...headers, authorization } });
}
