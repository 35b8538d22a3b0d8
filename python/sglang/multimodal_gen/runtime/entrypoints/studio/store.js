// What this browser keeps: images with the settings that made them, and the settings of videos, which the server keeps.

const NAME = "sglang-studio";
const MAX_IMAGES = 500;

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("images", { keyPath: "id" }).createIndex("created", "created");
      request.result.createObjectStore("settings", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/** The result of one request, once its transaction is through. */
async function run(store, mode, work) {
  const transaction = (await database()).transaction(store, mode);
  const request = work(transaction.objectStore(store));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** All images, newest first. */
export async function images() {
  const found = await run("images", "readonly", (store) => store.getAll());
  return found.toSorted((a, b) => b.created - a.created);
}

/** Keep an image: {id, created, settings, blob, …}. The oldest go when there are many. */
export async function keepImage(record) {
  await run("images", "readwrite", (store) => store.put(record));
  const ids = (await images()).slice(MAX_IMAGES).map((image) => image.id);
  for (const id of ids) await forgetImage(id);
}

export const forgetImage = (id) => run("images", "readwrite", (store) => store.delete(id));

/** Keep what a video was made with, which the server tells in part only. */
export const keepSettings = (id, settings) => run("settings", "readwrite", (store) => store.put({ id, settings }));

export const settingsOf = async (id) => (await run("settings", "readonly", (store) => store.get(id)))?.settings ?? null;

export const forgetSettings = (id) => run("settings", "readwrite", (store) => store.delete(id));
